"""The bundled demo model (data files)."""
