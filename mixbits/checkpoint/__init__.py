"""Packed folders: written, checked, loaded, unpacked."""
