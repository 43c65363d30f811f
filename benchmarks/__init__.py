"""What icnnrt costs, as ratios measured side by side in one run. From the repository root, with the group `bench`:

    python -m benchmarks                              everything
    python -m benchmarks inner adjoint --threads 1    some parts, one thread alone
    python -m benchmarks --quick                      a look at whether it all works, in seconds
    python -m benchmarks --json result.json --plot scaling.png

Parts: `inner` and `adjoint`, the two operators against other ways to the same numbers; `argmin`, whole solves against
what their energy evaluations alone cost; `scaling`, how the cost of one step of a solve grows; `tune`, a step of
fine-tuning against one argmin and against the same step in torch; `heads`, the gradient map beside torch, and value
with gradient beside value alone; `polyhedron`, the argmin under linear constraints by one graph and by Python.

How it measures. All contenders of a row run in turn, round after round in changing order, so that whatever else the
machine does hits all of them; a ratio is the median of the ratios within each round, a time the median of all rounds.
ONNX graphs are called by io-binding with inputs and outputs bound beforehand; what Python and ONNX Runtime still add is
the contender `empty graph`. Absolute times depend on the machine and the hour, ratios much less.
"""
