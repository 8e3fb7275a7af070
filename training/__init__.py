"""Training of the embedded tiny text-to-video model; see README.md in this folder. Not part of the installed package."""
