"""Number formats: what values there are, how they are packed, and how they are found."""
