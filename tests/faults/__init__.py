"""What goes wrong outside the program, done to it for real: killed, stopped, out of disk, memory or files, its inputs changed.

After each fault the same command resumes and gives the same bytes as an undisturbed run, or is refused with a message;
nothing that was finished is lost. Here for the quick part, about a minute on a quiet machine:

    pytest tests/faults

and for all of it, 50 random kills included (SLIMLM_KILLS says how many, SLIMLM_SEED which moments):

    pytest tests/faults -m "slow or not slow"
    SLIMLM_KILLS=500 SLIMLM_SEED=7 pytest tests/faults -m slow -k random

Faults are real: SIGKILL, small tmpfs mounts (root only; else skipped with a reason), resource limits, files cut and changed.
The program has no hooks for them; a run is the command line in a process of its own, in which `harness` puts a signal at the
call of a function where a test names a moment. A loss of power needs a disk that forgets what was not synced, and is not done;
instead the order of writes, syncs and renames is checked.
"""
