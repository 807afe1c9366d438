"""Batch jobs.  In: a file of request lines.  Out: a file of result lines, each request once, whatever interrupts."""
