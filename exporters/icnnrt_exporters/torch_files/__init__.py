"""TorchScript files and torch.export programs, for hosts that have libtorch."""
