"""Training of the reference model. This package is in the sdist and not in the wheel.

Its commands run from a checkout in which `spark3r` is installed, and need no other dependency:

    python -m training.pool        # render training clips to disk
    python -m training.train       # train on them
    python -m training.evaluate    # score the weights on held-out scenes, rooms and real footage

`docs/reference-model.md` describes the model, the data and the run that made the shipped weights.
They belong to the generator in `spark3r.reference.scenes`. The generator in `scenes`, which
resembles real footage, is for the weights that come next.
"""
