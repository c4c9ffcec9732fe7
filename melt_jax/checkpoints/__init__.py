"""Model folders, read and written in published and in Orbax form."""
