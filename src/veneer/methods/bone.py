"""Bone: block affine adaptation, what MiSS was called at first (Kang & Yin 2024, arXiv:2409.15371).

    W' = W + B^T [1 1 ... 1]      B: (r, out); [1 1 ...]: (r, in)
    W'_pq = W_pq + W_pq B_p + B_p     "bat": W cut into (r, r) blocks, B: (out / r, r, r)

See ``miss.py``: only the tensor's name differs.
"""

from __future__ import annotations

from veneer.methods.miss import Miss

METHOD = Miss("bone_block")
