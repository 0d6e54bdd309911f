"""The custom resource as typed models."""
