"""Path-traced rooms for training and validation, by Blender's Cycles on the CPU.

This is a tool with an environment of its own, and no dependency of the packages:

    python3.11 -m venv venv-bpy
    venv-bpy/bin/pip install bpy==5.0.1 numpy==1.26.4
    venv-bpy/bin/pip install torch --index-url https://download.pytorch.org/whl/cpu
    apt-get download sweethome3d-furniture && dpkg -x sweethome3d-furniture_*.deb deb
    for f in deb/usr/share/sweethome3d/furniture/*.sh3f; do
        unzip -qo $f -d furniture/$(basename $f .sh3f); done
    venv-bpy/bin/python -m training.path_traced --library furniture --output runs/pool

Everything follows from a room's seed. Models and photographed surfaces are CC0 or CC-BY 3.0; the
latter's creators are named in `credits.jsonl` beside the shards. Rendered frames are not committed.
"""
