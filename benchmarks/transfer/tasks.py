"""The probe suite: questions that pretrained features have to answer, on clips that training never saw."""

from pathlib import Path
from typing import Any

from bestrq2.probing import ProbeTask, packaged_task

SOUND_CLASSES = ("animal", "voice", "footstep", "impact", "machine", "weapon", "water", "fire")
# Families with at least six General MIDI programs; ensemble has two and ethnic five, too few to hold some out.
FAMILIES = ("piano", "chromatic_percussion", "organ", "guitar", "bass", "strings", "brass", "reed", "pipe")
# A fixed strength of logistic regression: choosing it inside the training folds costs four times as much and changes
# little where hundreds of clips meet some hundred standardised columns. With the thousands of columns of joined rows it
# is no good choice for any encoder (docs/transfer_earlier.md, "The head decides"); it stays for the rows made with it.
# The ridge head chooses its strength, which costs it nothing.
STRENGTH = 0.02
# Octaves (MIDI pitch // 12) with at least 40 notes, and General MIDI programs with at least 12.
OCTAVES = ("2", "3", "4", "5", "6", "7")
PROGRAMS = (
    *("0", "2", "4", "17", "18", "19", "26", "40", "41", "42"),
    *("44", "45", "46", "52", "57", "64", "65", "66", "67", "70"),
)
# Voices of Hedgewars that speak English; they say the same 67 lines, more or less.
ACTORS = ("British", "Classic", "Default", "HillBilly", "Mobster", "Pirate", "Robot", "Russian", "Singer", "Surfer")


def strength(readout: dict[str, Any]) -> float | None:
    """Inverse strength of the L2 penalty for the head of a readout; None: chosen inside the training folds."""
    return STRENGTH if readout.get("head", "linear") == "linear" else None


def corpus_tasks(clips: Path, **readout: Any) -> dict[str, ProbeTask]:
    """Tasks on ``clips.csv`` of corpora.py, by name.

    - ``phrase-fr``, ``-it``, ``-es``: the same phrase by another voice, found among all phrases of the voice that
      pretraining heard; no training. The voices come from different codecs (G.722, GSM), so features are centred and
      scaled on each side by itself.
    - ``instrument``: one of nine families of single notes; whole General MIDI programs are held out.
    - ``pitch``: pitch class of these notes, the same folds. Statistics of a spectrogram are hard to beat here.
    - ``sound``: class of environmental sounds, trained on packages of pretraining, tested on others.
    - ``domain``: speech, music or environment, likewise.

    Args:
        clips: written by ``corpora.py``.
        readout: ``layers``, ``combine``, ``rows``, ``pooling`` and ``head`` of :class:`~bestrq2.probing.ProbeTask`.
    """
    common: dict[str, Any] = {"manifest": str(clips), **readout}
    trained: dict[str, Any] = {**common, "regularisation": strength(readout)}
    found = {}
    for lang in ("fr", "it", "es"):
        choices: dict[str, Any] = {
            "kind": "retrieval",
            "label": "pair",
            "split": "voice",
            "where": (("lang", (lang,)),),
            "scaling": "sides",
        }
        found[f"phrase-{lang}"] = ProbeTask(**common, **choices)
    notes: dict[str, Any] = {"group": "group", "folds": 8, "where": (("kind", ("note",)), ("label", FAMILIES))}
    found["instrument"] = ProbeTask(**trained, label="label", **notes)
    found["pitch"] = ProbeTask(**trained, label="pitch", **notes)
    found["sound"] = ProbeTask(
        **trained,
        label="label",
        group="group",
        split="split",
        train_values=("pretrain",),
        test_values=("probe",),
        where=(("domain", ("environment",)), ("label", SOUND_CLASSES)),
    )
    found["domain"] = ProbeTask(**trained, label="domain", group="group", split="part")
    return found


def held_out_tasks(clips: Path, **readout: Any) -> dict[str, ProbeTask]:
    """Tasks on ``clips.csv`` that no recipe was chosen by: look at them once, for what is finished.

    - ``octave``: octave of single notes; whole General MIDI programs are held out.
    - ``program``: which of 20 General MIDI programs plays a single note; other notes of them are held out.
    - ``line``: the same line by another of ten actors, among the lines of all the others; no training.
    - ``actor``: which of these actors speaks; whole lines are held out. One package, but ten recordings.
    - ``take``: another take of the same sound effect among all environmental sounds; no training.

    Args:
        clips, readout: as for :func:`corpus_tasks`.
    """
    common: dict[str, Any] = {"manifest": str(clips), **readout}
    trained: dict[str, Any] = {**common, "regularisation": strength(readout)}
    notes = (("kind", ("note",)),)
    actors = (("speaker", tuple(f"hedgewars-{name}" for name in ACTORS)),)
    return {
        "octave": ProbeTask(**trained, label="octave", group="group", folds=8, where=(*notes, ("octave", OCTAVES))),
        "program": ProbeTask(**trained, label="program", group="item", folds=8, where=(*notes, ("program", PROGRAMS))),
        "line": ProbeTask(**common, kind="retrieval", label="item", group="speaker", where=actors),
        "actor": ProbeTask(**trained, label="speaker", group="item", folds=8, where=actors),
        "take": ProbeTask(**common, kind="retrieval", label="group", where=(("domain", ("environment",)),)),
    }


def packaged_tasks(**readout: Any) -> dict[str, ProbeTask]:
    """Speech, music or environment on the 24 clips of the package: a check of the machinery, not of an encoder."""
    return {"packaged": packaged_task(regularisation=strength(readout), **readout)}
