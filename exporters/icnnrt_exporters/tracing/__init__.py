"""A torch module, brought to functional aten graphs: the energy, its derivatives, operators rewritten."""
