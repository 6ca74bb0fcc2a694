"""`python -m trsp_deploy`, the form that launchers want: `accelerate launch -m trsp_deploy prune ...`."""

from trsp_deploy.cli import main

main()
