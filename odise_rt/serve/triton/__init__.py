"""``odise-rt export-triton``: a model repository for NVIDIA's Triton Inference Server.

``repository.py`` writes it, ``model_config.py`` derives each config.pbtxt from the bundle's specs. ``orchestrator.py``,
``stage_model.py`` and ``bls.py`` run inside Triton's Python backend, where this package must be installed.
"""
