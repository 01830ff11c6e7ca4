"""CUDA kernels: their sources, what is correct (:mod:`.reference`) and how they are loaded (:mod:`.native`)."""
