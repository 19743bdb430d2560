"""The plugins this project ships. The core finds them as it finds anyone's: by entry point."""
