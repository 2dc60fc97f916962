"""Files of video on one side, uint8 RGB frames on the other. No torch.

encode  frames -> an MP4, WebM or GIF file, verified
decode  a caller's picture or video -> frames
"""
