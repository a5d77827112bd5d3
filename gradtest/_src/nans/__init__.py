"""Where a gradient stops being finite, and the guarded formula to use there."""
