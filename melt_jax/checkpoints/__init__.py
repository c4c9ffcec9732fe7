"""Model folders: the published form and the Orbax form, read and written."""
