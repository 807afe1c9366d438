"""Plans.  In: chunks, budgets, a machine.  Out: homes, a schedule, predicted seconds.  Integers only."""
