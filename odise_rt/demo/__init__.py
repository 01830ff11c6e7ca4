"""A web page to try a bundle: ``odise-rt demo``.

::

    server.py    web server: pictures in and out of memory, headers, nothing from elsewhere
    page.py      layout in Gradio and events;  assets/: the picture with its segments (HTML, CSS, JavaScript)
    session.py   the logic without the page: one network run a picture, names as often as wanted
    views.py     what is drawn of a result: regions, colours, best names, maps
    downloads.py the files that visitors can take with them
    pictures.py  visitors' pictures, bounded, in memory only
    examples.py  pictures to start with

Needs the extra ``demo`` (Gradio); importing these modules does not.
"""
