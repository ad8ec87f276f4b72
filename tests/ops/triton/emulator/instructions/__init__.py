"""The instructions of PTX that the emulator knows."""
