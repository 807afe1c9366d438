"""Encoders and groups of students over HTTP.  In: requests.  Out: labels or vectors, or a status that says why not.

Starlette and uvicorn are imported by `app`, `protocol` and `server` alone, which nothing imports before serving.
"""
