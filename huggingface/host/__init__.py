"""The machine: its devices, its memory, and importing torch and transformers late."""
