"""The control plane: CLI, daemon and fleet link."""
