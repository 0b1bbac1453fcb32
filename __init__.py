"""Pilotfish: a small model drafts on the device, a large one answers only for what the small one is unsure of."""
