"""The workshop of the demo model: its world, its training, its score, and pictures of its videos."""
