"""Independent judges of lorafit's numbers: other people's libraries, and slow versions that are obviously right."""
