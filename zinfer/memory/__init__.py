"""Memory.  In: the moves of a schedule.  Out: bytes in the right tier, leased and accounted for."""
