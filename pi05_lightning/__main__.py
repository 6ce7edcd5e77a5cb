from pi05_lightning.cli.main import main

main()
