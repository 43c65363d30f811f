"""Checks of what a package says of itself: its files, the signs of its weights, its convexity, and golden data."""

from collections.abc import Iterator
from typing import Final

from icnnrt.checking import golden
from icnnrt.checking.report import Check, Verdict, judged, skipped
from icnnrt.checking.trial import Trial
from icnnrt.convexity import Grounds, Repeated

VERDICTS: Final[dict[str, Verdict]] = {"proven": "pass", "violated": "fail", "unknown": "skipped"}


def files(trial: Trial) -> Iterator[Check]:
    """Sizes, hashes and the structure of every file, which `Package.open` has looked at; and the weights of which f's
    convexity in y asks a sign: how far within it the nearest entry is."""
    manifest = trial.manifest
    count = len(manifest.graphs) + len(("manifest", "weights")) + (manifest.golden is not None)
    yield judged("package", 0.0, 0.0, f"{count} files agree with the manifest")
    marked = trial.manifest.weights.signs
    if not marked:
        instead = "" if trial.manifest.kind == "qp" else "; convexity is tried instead"
        yield skipped("signs", f"no sign is asked of any weight{instead}", 0.0)
        return
    inside = min(-sign.violation(trial.package.weights[name]) for name, sign in marked.items())
    detail = f"how far within its sign the nearest entry of {len(marked)} weights is"
    yield Check("signs", inside, 0.0, "pass" if inside >= 0 else "fail", detail)


def proof(trial: Trial) -> Iterator[Check]:
    """What disciplined rules say of the value graph (`icnnrt.convexity`); that they say nothing is no failure."""
    found = trial.session.prove_convexity(trial.X)
    excess = found.witness.excess if found.witness else None
    told, verdict = found.sentence().removesuffix("."), VERDICTS[found.verdict]
    if found.verdict == "proven" and found.rests_on is not None:
        weights = trial.manifest.weights
        noted = Grounds(weights.signs, found.rests_on)
        again = Repeated(trial.package.graphs["value"], trial.package.weights, noted, weights.trainable)
        if lost := again.failure(trial.package.weights):
            told += f", but not for all weights with the signs that the manifest notes: {lost}"
            verdict = "fail"
        elif noted.signs:
            told += ", and with all weights of the signs that the manifest notes"
    yield Check("convexity proof", excess, None, verdict, told)


def outputs(trial: Trial) -> Iterator[Check]:
    """Golden data: outputs stored at the export, against the same computed here."""
    for name, difference, bound in golden.replay(trial.session, trial.package.golden):
        yield judged(f"golden: {name}", difference, bound, "stored at the export against computed here")
