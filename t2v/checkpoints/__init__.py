"""Files only: a model's folder, checked, loaded, written and converted; LoRAs."""
