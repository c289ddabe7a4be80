//! A call of a script whose arguments lie in one piece of memory. The library's own makes a piece for each of them, and there are four for
//! every record at the least.

use std::fmt::Display;

use redis::{
    Cmd, ErrorKind, FromRedisValue, RedisResult, RedisWrite, Script, ServerErrorKind, ToRedisArgs,
    aio::MultiplexedConnection,
};

/// What an entry has for a key or a value that its record has not. No format has one like it, and consumers of Debezium Server know it.
pub(super) const ABSENT: &[u8] = b"default";

/// A script, its keys and its arguments.
pub(crate) struct Call<'a> {
    script: &'a Script,
    command: Cmd,
}

impl<'a> Call<'a> {
    /// A call with these keys, which has room for about so many bytes of arguments.
    pub(crate) fn new(script: &'a Script, keys: &[&str], room: usize) -> Self {
        let mut command = Cmd::with_capacity(0, room);
        command.arg("EVALSHA").arg(script.get_hash()).arg(keys.len()).arg(keys);
        Self { script, command }
    }

    /// Adds an argument.
    pub(crate) fn arg(&mut self, argument: impl ToRedisArgs) -> &mut Self {
        self.command.arg(argument);
        self
    }

    /// Adds an argument as it is shown to people.
    pub(crate) fn shown(&mut self, argument: impl Display) -> &mut Self {
        self.command.write_arg_fmt(argument);
        self
    }

    /// Adds what an entry holds of a record, in the order of the scripts, without its headers.
    pub(crate) fn content(&mut self, key: Option<&[u8]>, value: Option<&[u8]>) -> &mut Self {
        self.arg(key.unwrap_or(ABSENT)).arg(value.unwrap_or(ABSENT))
    }

    /// Adds the fields that an entry has for its record's headers: by their names in upper case, as Debezium Server has them.
    pub(crate) fn headers<'h>(&mut self, headers: impl Iterator<Item = (&'h str, &'h [u8])>) {
        for (name, value) in headers {
            self.arg(name.to_uppercase()).arg(value);
        }
    }

    /// Runs the script, and has the server learn it first where it does not know it.
    pub(crate) async fn run<T: FromRedisValue>(&self, connection: &mut MultiplexedConnection) -> RedisResult<T> {
        match self.command.query_async(connection).await {
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                self.script.load_async(connection).await?;
                self.command.query_async(connection).await
            }
            answer => answer,
        }
    }
}
