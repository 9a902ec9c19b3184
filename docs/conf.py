"""Settings of the rendered course (`make docs`). Notebooks are shown as they are stored; nothing is run or fetched."""

project = "diffusion_opt"
author = "the authors of diffusion_opt"
extensions = ["myst_nb", "sphinx-mathjax-offline"]
nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath", "amsmath", "html_image"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = "diffusion_opt"
html_show_sourcelink = False
html_show_copyright = False
templates_path: list[str] = []
exclude_patterns = ["build"]
