#!/bin/sh
# make-user.sh NAME ID: a user without a password or a shell, whose home alone it may write to.
set -eu
groupadd --gid "$2" "$1"
useradd --uid "$2" --gid "$2" --home-dir "/home/$1" --create-home --shell /usr/sbin/nologin "$1"
chmod 700 "/home/$1"
