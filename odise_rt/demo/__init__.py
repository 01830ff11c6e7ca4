"""A web page to try a bundle: ``odise-rt demo``.

::

    server.py       web server: headers, nothing from elsewhere
    routes.py       pictures in, masks, names and files out;  asked.py: what the page asks for
    page.py         layout in Gradio;  assets/: the picture with its segments (HTML, CSS, JavaScript)
    session.py      the logic without the page: one network run a picture, names as often as wanted
    views.py        what is drawn of a result: regions, colours, best names, maps
    corrections.py  names and omissions by hand
    downloads.py    the files that visitors can take with them
    pictures.py     visitors' pictures, bounded, in memory only
    examples.py     pictures to start with

Needs the extra ``demo`` (Gradio); importing these modules does not.
"""
