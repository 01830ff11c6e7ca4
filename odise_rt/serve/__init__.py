"""``odise-rt serve``: segmentation over HTTP.

::

    client ─ http.py: limits, queue, deadline ─ dispatch.py: threads here ──────────┐
                                              └ application.py: Ray Serve replicas ─┴─ worker.py: one request ─ answer

Read ``worker.py`` for what is done with a request and ``http.py`` for what the outside sees of it. Nothing here is
imported by the rest of the package, and FastAPI, uvicorn and Ray only when a server is started.
"""

MISSING_PACKAGES = (
    "serving needs more packages: pip install 'odise_rt[serve]', or 'odise_rt[serve-local]' for --in-process alone"
)
