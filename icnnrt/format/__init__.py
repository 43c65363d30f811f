"""The package on disk: files, graphs' wire format, the manifest, signatures, the verdict's record, checkpoints."""
