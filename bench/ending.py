"""The end of a program that runs in a forked process.

    leave(ending(main))             # in the process that was forked

Python takes everything down before it ends. In a process that was forked from one with large
libraries this would copy their memory, so the exit code is found here, as Python finds it, and the
process ends at once. What is registered with atexit is left to the caller: it may belong to the
process that forked.
"""
import contextlib
import os
import signal
import sys


def ending(program):
    """Call program() → the exit code that Python would end with; negative: the signal that it
    would die of. Exceptions are printed.
    """
    try:
        program()
    except SystemExit as e:
        if e.code is None or isinstance(e.code, int):
            return (e.code or 0) & 0xff
        print(e.code, file=sys.stderr)
        return 1
    except BaseException as e:
        sys.excepthook(type(e), e, e.__traceback__)
        return -signal.SIGINT if isinstance(e, KeyboardInterrupt) else 1
    return 0


def leave(code):
    """End this process."""
    for file in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            file.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
