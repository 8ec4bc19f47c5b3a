"""What writes the site: pages from the catalogue, the reports, the commands and the docstrings.

Not installed with the library. `hook` hands the pages to mkdocs while it builds; the rest are
functions of the sources to Markdown, path -> text.
"""
