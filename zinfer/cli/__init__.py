"""Command line.  In: words.  Out: lines and exit codes.  The only place that prints or exits."""
