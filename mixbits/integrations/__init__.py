"""mixbits inside other programs; each module imports the program that it is for."""
