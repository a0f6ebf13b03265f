"""Where the time and the bytes of a step go."""
