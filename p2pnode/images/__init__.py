"""Artifact kinds <-> manifests: importers and exporters, one file per kind."""
