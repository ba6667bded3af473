"""Lets ``import peft`` mean Veneer in this process, for libraries and scripts that import peft by name.

Importing this module does it, before anything imports peft::

    import veneer.as_peft
    from trl import SFTTrainer      # whose ``import peft`` gets Veneer

``python -m veneer.as_peft script.py ...`` does it for a script that stays as it is, and with ``VENEER_AS_PEFT=1`` in
the environment every Python process does it when it starts. :func:`undo` ends it. Importing this module imports no
torch.
"""

from __future__ import annotations

from veneer.as_peft.import_hook import install, undo

__all__ = ["install", "undo"]

install()
