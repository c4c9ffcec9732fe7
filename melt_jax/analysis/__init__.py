"""What compiled programs do and what a step needs: HLO text, FLOPs, chips."""
