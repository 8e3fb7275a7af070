"""Training of the embedded tiny model; see README.md in this folder. Not part of the installed package."""
