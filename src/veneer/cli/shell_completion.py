"""Shows or installs the completion of commands and options for a shell."""

from __future__ import annotations

import shlex
from pathlib import Path

from click import shell_completion

from veneer.errors import UsageError

# The line of a shell's start-up file that reads a script.
_READ = {"bash": ". {}", "zsh": "autoload -Uz compinit && compinit && . {}"}


def run(option: str, shell: str) -> str:
    """Install completion, or show its script; return what is to be printed.

    Args:
        option: ``"install_completion"`` or ``"show_completion"``.
        shell: the shell's name; the one that runs this process where it is empty.
    """
    shell = shell or _running()
    completion = shell_completion.get_completion_class(shell)
    if completion is None:
        raise UsageError(f"There is no completion for {shell!r}.", hint="Name bash, zsh, fish or powershell.")
    from veneer.cli.app import application

    script = completion(application, {}, "veneer", "_VENEER_COMPLETE").source()
    return script if option == "show_completion" else f"Completion for {shell} is installed: {_install(shell, script)}"


def _running() -> str:
    """Return the name of the shell that runs this process."""
    import shellingham

    try:
        return str(shellingham.detect_shell()[0])
    except shellingham.ShellDetectionFailure:
        raise UsageError("It is not known which shell this is.", hint="Name it: bash, zsh, fish, powershell.") from None


def _install(shell: str, script: str) -> Path:
    """Write a script where its shell reads it, and return its path."""
    if shell != "fish" and shell not in _READ:
        raise UsageError(
            f"Completion is not installed by itself in {shell}.",
            hint=f"Put what `veneer --show-completion {shell}` prints into its profile.",
        )
    path = Path.home() / (".config/fish/completions/veneer.fish" if shell == "fish" else f".veneer-completion.{shell}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(script, encoding="utf-8")
    if shell in _READ:
        line, start_up = _READ[shell].format(shlex.quote(str(path))), Path.home() / f".{shell}rc"
        before = start_up.read_text(encoding="utf-8") if start_up.exists() else ""
        if line not in before.splitlines():
            start_up.write_text(f"{before.rstrip()}\n{line}\n".lstrip(), encoding="utf-8")
    return path
