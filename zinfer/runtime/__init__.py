"""Runtime.  In: requests and a schedule.  Out: tokens.  The one generation loop."""
