from pi05_lightning.cli import main

main()
