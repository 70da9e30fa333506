"""The public losses, their options and inputs."""
