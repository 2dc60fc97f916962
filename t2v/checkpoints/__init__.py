"""Files only: a model's folder, checked, loaded, written, converted and downloaded; LoRAs."""
